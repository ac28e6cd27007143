"""From a job to what should exist for it. Pure: nothing here talks to anyone."""
