//! What is to become of an instance's pages that are, or could be, in swap.

/// What the agent does about an instance on a swap pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Wish {
    /// What is cold goes.
    #[default]
    Out,
    /// Nothing is moved.
    Hold {
        /// For people.
        reason: String,
    },
    /// What has gone comes back.
    Back {
        /// For people.
        reason: String,
    },
}
