"""A run on a Ray of two nodes, one of which is killed during the run: `python two_nodes.py CONFIG.json`."""

import json
import os
import sys
from pathlib import Path

# A node counts as dead after two seconds without a sign of life; Ray's own default is half a minute.
for name, value in (("period_ms", 500), ("timeout_ms", 1000), ("failure_threshold", 3), ("initial_delay_ms", 500)):
    os.environ[f"RAY_health_check_{name}"] = str(value)


def main() -> None:
    from ray.cluster_utils import Cluster

    from limbeck.config import load_mapping
    from limbeck.launch.on_ray import run_on_ray

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    other = cluster.add_node(num_cpus=4)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    killed = []

    def log(line: str) -> None:
        print(line, flush=True)
        if "step 25/" in line and not killed:
            killed.append(other)
            cluster.remove_node(other, allow_graceful=False)
            print("a node was killed", flush=True)

    try:
        run_on_ray(load_mapping(json.loads(Path(sys.argv[1]).read_text())).config, log)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
