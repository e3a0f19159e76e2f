//! The proxy under strangers and crowds, through the real binary, before a server that costs nothing: what must not break
//! it, and what it may cost.
//!
//! | variable | meaning |
//! |---|---|
//! | `PGHERD_TEST_STRANGERS` | malformed connections; 50000 unless set |
//! | `PGHERD_TEST_CHURN_SECONDS` | how long sessions come and go; 10 unless set, and 600 in the long scenarios |

#[path = "endurance/calls.rs"]
mod calls;
#[path = "endurance/crowd.rs"]
mod crowd;
#[path = "endurance/slow.rs"]
mod slow;
#[path = "endurance/stage.rs"]
mod stage;
#[path = "endurance/strangers.rs"]
mod strangers;
