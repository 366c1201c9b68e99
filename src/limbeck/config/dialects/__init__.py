"""Configuration formats that Limbeck reads, registered by name in ``limbeck.registry.DIALECTS``.

A dialect is one file here (or in a plug-in): it recognises its own configurations and translates them to Limbeck's keys.
"""
