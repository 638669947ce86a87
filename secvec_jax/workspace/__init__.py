"""Run directories: what went into a run, known by its content, and who works in its folder."""
