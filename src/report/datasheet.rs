pub(super) struct Claim {
    pub(super) device: &'static str,
    pub(super) what: &'static str,
    pub(super) dense: Option<f64>,
    pub(super) sparse: Option<f64>,
    pub(super) says: &'static str,
    pub(super) source: &'static str,
    pub(super) url: &'static str,
}
pub(super) const CLAIMS: &[Claim] = &[];
