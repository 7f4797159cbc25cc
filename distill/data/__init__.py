"""DATA: where a job's batches come from, as a recipe names it. Each is a frozen dataclass with ``open(teacher)``."""

from distill.data.law import TeacherLaw
from distill.data.mixture import Mixture
from distill.data.shards import Shards

DataConfig = Shards | Mixture | TeacherLaw
DATA: dict[str, type[DataConfig]] = {"shards": Shards, "mixture": Mixture, "teacher_law": TeacherLaw}
