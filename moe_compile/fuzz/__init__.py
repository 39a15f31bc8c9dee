"""Random MoE programs, rewritten against original: ``python -m moe_compile.fuzz --seed 0 --count 100``."""
