"""torchao Quantizers, one thin file a target over one table-driven engine."""
