"""Loops over experts that Dynamo cannot capture: rewritten while it traces, proved afterwards."""
