"""Tasks of lm-evaluation-harness. `python -m headrace.cluster.evaluation.harness` is its command line, which
knows the model "headrace" then. Needs the extra `eval`."""
