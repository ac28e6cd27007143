"""The job contract: what the operator hands to the trainer and gets back.

Standard library and pydantic only; both sides import it.
"""
