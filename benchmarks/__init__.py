"""What produced each figure of docs/benchmarks.md, docs/scaling.md, docs/tuning.md and docs/performance.md."""
