"""The noise schedule, sampling plans, the samplers that fill them, the loop that runs them, and guidance."""
