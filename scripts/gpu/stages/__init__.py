"""One module per stage: ``run(sizes, record)`` measures and records; ``scripts.gpu.plan`` has their order."""
