"""Custom ops: schema, fakes, CPU and CUDA implementations."""
from . import cpu as cpu
from . import schema as schema
