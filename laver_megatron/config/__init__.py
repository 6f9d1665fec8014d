"""The fields of a run, how they are read, and what is refused before anything is allocated."""
