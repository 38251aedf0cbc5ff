//! The factory is cut off anywhere, or its host is. These take longest, and tests start in the order of their names.

mod kill_points;
mod kills;
mod power_loss;
