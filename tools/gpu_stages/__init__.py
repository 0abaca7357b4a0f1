"""The stages of `tools/gpu_day.py`: each is one module with `run(context)`, which appends rows as it measures."""
