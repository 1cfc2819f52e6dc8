//! The kernel's notation for sets of CPUs: `0-3,8,10-11`.

use rswap_types::CpuSet;

/// Linux is never built for more logical CPUs than this; it also bounds what a hostile range can cost.
pub const MAX_CPUS: usize = 8192;

/// Why a text is not a set of CPUs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuListError {
    /// A part is neither a number nor a range.
    #[error("{0:?} in a CPU list is neither a CPU number nor a range such as 0-3")]
    Part(String),
    /// A range that ends before it starts.
    #[error("the CPU range {0:?} ends before it starts")]
    Backwards(String),
    /// A number that no kernel has.
    #[error("CPU {0} is out of range: at most {max} CPUs are possible", max = MAX_CPUS)]
    TooLarge(usize),
}

/// Reads a list such as `0-3,8`. An empty text is the empty set, as in sysfs.
pub fn parse(text: &str) -> Result<CpuSet, CpuListError> {
    let mut cpus = CpuSet::new();
    for part in text.trim().split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let number = |digits: &str| {
            let cpu: usize = digits.trim().parse().map_err(|_| CpuListError::Part(part.to_owned()))?;
            if cpu < MAX_CPUS { Ok(cpu) } else { Err(CpuListError::TooLarge(cpu)) }
        };
        match part.split_once('-') {
            None => {
                cpus.insert(number(part)?);
            }
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last)?);
                if last < first {
                    return Err(CpuListError::Backwards(part.to_owned()));
                }
                cpus.extend(first..=last);
            }
        }
    }
    Ok(cpus)
}

/// Writes a set in the kernel's notation, with ranges.
pub fn format(cpus: &CpuSet) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut rest = cpus.iter().copied().peekable();
    while let Some(first) = rest.next() {
        let mut last = first;
        while let Some(next) = rest.next_if(|&cpu| cpu == last + 1) {
            last = next;
        }
        parts.push(if first == last { first.to_string() } else { format!("{first}-{last}") });
    }
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_what_sysfs_writes() {
        assert_eq!(parse("0-1,3\n").unwrap(), CpuSet::from([0, 1, 3]));
        assert_eq!(parse("").unwrap(), CpuSet::new());
        assert_eq!(parse("3-1"), Err(CpuListError::Backwards("3-1".into())));
        assert_eq!(parse("0-99999999999999"), Err(CpuListError::TooLarge(99_999_999_999_999)));
        assert_eq!(parse("a"), Err(CpuListError::Part("a".into())));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in ".{0,64}") {
            let _ = parse(&text);
        }

        #[test]
        fn what_is_written_is_read_back(cpus in proptest::collection::btree_set(0..MAX_CPUS, 0..40)) {
            prop_assert_eq!(parse(&format(&cpus)).unwrap(), cpus);
        }
    }
}
