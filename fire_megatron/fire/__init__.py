"""FiRe: filter trajectories, then reweight tokens, over the global batch. Tensor math; the reducer is passed in."""
