//! The failure matrix of a program that works in a volume.

use rswap_tests::{failure_matrix, matrix::IN_THE_VOLUME, subjects::VolumeWorker};

failure_matrix!(VolumeWorker, &[IN_THE_VOLUME]);
