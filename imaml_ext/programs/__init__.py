"""Functions of one task as programs: tracing, lowering to instructions, memory."""
