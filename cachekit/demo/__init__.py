"""The models that ship with cachekit and what ``cachekit compare`` measures on them (needs the extra ``demo``)."""
