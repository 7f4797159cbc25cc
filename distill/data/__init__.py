"""DATA: where a job's batches come from, as a recipe names it. Each is a frozen dataclass with ``open(teacher)``."""

from distill.data.law import TeacherLaw
from distill.data.shards import Shards

DataConfig = Shards | TeacherLaw
DATA: dict[str, type[DataConfig]] = {"shards": Shards, "teacher_law": TeacherLaw}
