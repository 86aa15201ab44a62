"""Pure tensor functions: one file an operation, with its equation, reference and fast forms."""

from manyform.ops.operation import count, operation, operations, trace, use

__all__ = ["count", "operation", "operations", "trace", "use"]
