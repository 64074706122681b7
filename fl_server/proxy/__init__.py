"""The only door from the network to this machine's SuperLink and to enrolment: nginx, as configured here."""
