"""Reinforcement learning: experience, losses of policy and critic, the update loop."""
