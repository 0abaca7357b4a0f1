"""How the processes of a run start, stop and end."""
