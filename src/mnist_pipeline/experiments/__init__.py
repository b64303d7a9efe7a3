"""Many trainings: recipes, studies over seeds, sweeps over params, and where they run."""
