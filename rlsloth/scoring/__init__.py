"""Runs reward plugins in killable processes and validates what they return."""
