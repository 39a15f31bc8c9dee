"""Custom ops: schema, fakes, CPU and CUDA implementations."""
from . import cpu as cpu
from . import cuda as cuda
from . import fp8 as fp8
from . import schema as schema
