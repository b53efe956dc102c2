"""The experiment grid."""
