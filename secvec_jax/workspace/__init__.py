"""Run directories: a run's inputs, known by content; its stages, which resume; and the workspace of an experiment."""
