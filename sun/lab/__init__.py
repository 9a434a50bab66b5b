"""How the shipped models and the reports were made. Nothing else imports this."""
