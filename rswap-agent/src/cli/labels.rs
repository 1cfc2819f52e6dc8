//! `--label KEY=VALUE`.

use std::{collections::BTreeMap, str::FromStr};

/// One label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Label {
    key: String,
    value: String,
}

impl FromStr for Label {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => {
                Ok(Self { key: key.to_owned(), value: value.to_owned() })
            }
            _ => Err(format!("{text:?} is not a label: write KEY=VALUE")),
        }
    }
}

/// The labels by key; the last one of a key holds.
pub(super) fn by_key(labels: Vec<Label>) -> BTreeMap<String, String> {
    labels.into_iter().map(|label| (label.key, label.value)).collect()
}
