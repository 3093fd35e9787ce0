"""The agent evaluation app: what the episodes of a run were, and why its reward moved (`python
-m jaxgrpo.viewer RUN`)."""
