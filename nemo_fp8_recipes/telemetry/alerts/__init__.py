"""Alerts: rules over the logged statistics, each with a message that says what to do.

`schema` is the group `alerts` of the configuration, `rules` what each rule looks at, `watch` runs them over
the logging steps. No torch; the package itself imports nothing, so that the configuration stays light.
"""
