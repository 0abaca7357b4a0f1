"""Configuration of runs: dataclasses (`schema`), loading (`load`), checks (`validate`), DeepSpeed (`deepspeed`)."""
