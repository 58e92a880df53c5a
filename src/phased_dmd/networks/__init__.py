"""The networks of a run: the roles they play, and how the weights of a role are trained."""
