"""Knowledge distillation: one loss, teachers and schedules as values."""
