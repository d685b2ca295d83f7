"""Quantization-aware training in the graph: fake quantizers that round as convert does, learned steps, distillation."""
