"""Meta-learning methods: from a batch of tasks to its meta-gradient."""
