"""From a converted graph to an artefact that is proven: what a target is, and the way that all of them take."""
