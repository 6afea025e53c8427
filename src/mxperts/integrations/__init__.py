"""Where mxperts plugs into other people's programs; each module imports its program only when it is asked for."""
