"""flatmin: plan, train, measure and analyse many networks."""
