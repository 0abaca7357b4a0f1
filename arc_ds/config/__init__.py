"""Configuration of runs: dataclasses (`schema`), loading (`load`), ranges (`validate`), DeepSpeed (`deepspeed`)."""
