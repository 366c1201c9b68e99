"""A dialect: the settings of an imaginary trainer, from its YAML file or its flags (``--big``, ``--small``, ...)."""

from collections.abc import Mapping

from limbeck.config.translation import Translation
from limbeck.registry import DIALECTS

KEYS = {
    "big": "teacher_pretrain",
    "small": "student_pretrain",
    "rows": "student.data_args.file_name",
    "heat": "kd_temperature",
    "steps": "max_steps",
    "out": "output_dir",
}


class ToyDialect:
    name = "toykd"
    system = "ToyKD"

    def recognises(self, source):
        return "big" in source if isinstance(source, Mapping) else "--big" in source

    def translate(self, source, locations):
        result = Translation({})
        given = source if isinstance(source, Mapping) else dict(zip(source[::2], source[1::2], strict=True))
        for key, value in given.items():
            name = key.removeprefix("--")
            if name in KEYS:
                result.put(KEYS[name], value, key)
            elif name != "plugins":
                result.refuse(key, "is not a setting of ToyKD")
        return result


DIALECTS.register("toykd")(ToyDialect())
