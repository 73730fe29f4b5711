"""Accounts and quotas: who somebody is, what they may do, and how much they may use."""
