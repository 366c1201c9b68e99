"""A teacher: computes the signal of every micro-batch once and keeps it in host memory.

Use it with ``teacher.source: memory_cache``. Worthwhile with several epochs over the same micro-batches.
"""

from dataclasses import replace

from limbeck.registry import TEACHERS
from limbeck.teachers.local import load_teacher


class CachedTeacher:
    def __init__(self, teacher):
        self.teacher, self.signals, self.hits = teacher, {}, 0

    @property
    def info(self):
        return self.teacher.info

    def request(self, batch, spec):
        def future(micro_batch):
            if batch.row_ids in self.signals:
                self.hits += 1
            else:
                signal = self.teacher.request(batch, spec)(micro_batch)
                self.signals[batch.row_ids] = replace(signal, hidden=signal.hidden.cpu())
            signal = self.signals[batch.row_ids]
            return replace(signal, hidden=signal.hidden.to(micro_batch.input_ids.device))

        return future

    def metrics(self):
        return {"teacher/cache_hits": float(self.hits)}

    def offload(self):
        self.teacher.offload()

    def reload(self):
        self.teacher.reload()


TEACHERS.register("memory_cache")(lambda context: CachedTeacher(load_teacher(context)))
