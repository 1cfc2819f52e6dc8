//! Pseudo-terminals whose both ends are in the instance.
//!
//! A detached instance has a devpts of its own, so a pair has the same number everywhere. A process gets its controlling
//! terminal from its parent, so the pairs are there before the first child is: those that control a session are named in
//! the layout, long before the freeze.
//!
//! ```text
//!   source        describe   settings, window, session, and what is queued: taken out, and put back at once
//!   destination   control    a stub that leads a session gets its terminal
//!                 restore    settings, window, queues, foreground group
//! ```

mod describe;
mod queues;
mod restore;

use serde::{Deserialize, Serialize};

pub(super) use self::describe::{describe_master, describe_slave};
pub use self::{
    describe::controlling,
    restore::{Terminals, set_foreground},
};

/// A pair, as its master tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// `struct termios2`.
    pub settings: Vec<u8>,
    /// Rows, columns, pixels.
    pub window: [u16; 4],
    /// The slave can't be opened yet.
    pub locked: bool,
    /// `TIOCPKT`.
    pub packets: bool,
    /// `TIOCEXCL`.
    pub exclusive: bool,
    /// The slave was opened, and everybody has closed it.
    pub hung_up: bool,
    /// Foreground group, in the instance's namespace; 0 for none.
    pub foreground: i32,
    /// Permissions, user and group of the slave.
    pub access: (u32, u32, u32),
    /// What was typed and not read yet.
    pub input: Vec<u8>,
    /// What was printed and not taken by the master yet.
    pub output: Vec<u8>,
    /// Output was stopped.
    pub stop: Option<Stop>,
}

/// How the output of a terminal was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stop {
    /// By a call (`TCOOFF`): only a call lets it go on.
    Call,
    /// By a key (Ctrl-S).
    Key,
}
