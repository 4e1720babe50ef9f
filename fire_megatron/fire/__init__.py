"""FiRe: filter trajectories, then reweight tokens, over the global batch. Pure tensor math; the reducer is passed in."""
