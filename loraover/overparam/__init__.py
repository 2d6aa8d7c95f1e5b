"""The method: sites, cores, decompositions, importance scores, schedules and optimizer hooks."""
