//! What a migration can't do without of a kernel, the source's or the destination's. `rswap doctor` looks for the same.

use crate::profile::doctor::{Feature, Needed};

/// A migration, as far as it decides what is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Case {
    /// The instance has an address of its own.
    pub own_address: bool,
    /// Its clocks are not those of the kernel.
    pub other_clocks: bool,
}

/// The features that are not there and are needed in this case: each with how it was missed, and what to do.
pub fn lacking(features: &[Feature], case: Case) -> Vec<(String, String)> {
    let is_needed = |feature: &Feature| match feature.needed_by {
        Needed::Never => false,
        Needed::ByMigrations => true,
        Needed::ByAddresses => case.own_address,
        Needed::ByOtherClocks => case.other_clocks,
    };
    let lacking = features.iter().filter(|feature| !feature.present && is_needed(feature));
    lacking
        .map(|Feature { name, detail, remedy, .. }| {
            let remedy = format!("this host's kernel has it not ({detail}): {remedy} is needed");
            (format!("kernel feature {name}"), remedy)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::doctor;

    const CASES: [Case; 3] = [
        Case { own_address: false, other_clocks: false },
        Case { own_address: true, other_clocks: false },
        Case { own_address: false, other_clocks: true },
    ];

    #[test]
    fn each_lack_is_refused_by_its_name_where_it_matters() {
        let all: Vec<Feature> =
            doctor::migration_features().into_iter().map(|f| Feature { present: true, ..f }).collect();
        assert!(all.len() >= 10, "{all:#?}");
        for case in CASES {
            assert_eq!(lacking(&all, case), [], "{case:?}");
        }
        for (at, missing) in all.iter().enumerate() {
            let mut features = all.clone();
            features[at].present = false;
            features[at].detail = "looked for in vain".to_owned();
            let refused = CASES.map(|case| lacking(&features, case));
            let wanted = match missing.needed_by {
                Needed::ByMigrations => [true, true, true],
                Needed::ByAddresses => [false, true, false],
                Needed::ByOtherClocks => [false, false, true],
                Needed::Never => [false; 3],
            };
            assert_eq!(refused.each_ref().map(|found| !found.is_empty()), wanted, "{missing:?}");
            for (item, reason) in refused.iter().flatten() {
                assert_eq!(*item, format!("kernel feature {}", missing.name));
                assert!(
                    reason.contains("looked for in vain") && reason.contains(&missing.remedy),
                    "{reason}"
                );
                assert!(!missing.remedy.is_empty());
            }
        }
        // All that is missing is named at once.
        let none: Vec<Feature> = all.iter().map(|f| Feature { present: false, ..f.clone() }).collect();
        let everything = Case { own_address: true, other_clocks: true };
        assert_eq!(lacking(&none, everything).len(), all.len());
    }
}
