//! Surgery on a foreign process: stop it, read it, rebuild it. No network here.
